"""Worlds to run Hone in. Nothing under the product's packages imports these."""
