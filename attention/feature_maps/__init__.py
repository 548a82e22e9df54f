"""Feature maps phi with E[phi(q) . phi(k)] = K(q, k), one family per file."""
