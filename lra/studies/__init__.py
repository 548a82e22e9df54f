"""The papers' other experiments, each with its own runner, records, table and figure."""
