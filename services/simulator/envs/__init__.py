"""One file per simulator; `base.make(name)` builds one."""
