"""Tests of the op dialect: contracts, implementations against dense float64, and what Inductor makes of them."""
