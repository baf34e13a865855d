"""Tests of the repository itself: its layout, its rules, what importing it costs."""
