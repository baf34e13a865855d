"""Tests of index expressions and of the reader."""
