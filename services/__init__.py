"""The services around the method. A service imports `services.runtime` and `world2act`, never another service."""
