"""`world2act`: a client of the doors that also starts the services as processes."""
