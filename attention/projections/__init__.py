"""Projections omega: random or learned matrices [F, D] behind every random feature map."""
