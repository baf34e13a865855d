"""Independent, slow implementations to compare with."""
