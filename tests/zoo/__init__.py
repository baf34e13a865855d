"""Every kind of decoder there is, through the same four checks."""
