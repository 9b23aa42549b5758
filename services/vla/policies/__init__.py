"""One file per base policy; `base.make(settings)` builds the one that the settings name."""
