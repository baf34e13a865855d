"""Tests of stores, views, the call boundary and statistics."""
