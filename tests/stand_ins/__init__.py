"""Packages that cannot be had here, as far as our adapters use them: independent code that serves documented layouts."""
