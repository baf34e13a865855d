"""Tests of the analyses of captured graphs."""
