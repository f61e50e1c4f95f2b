"""What requests use: read from answers, kept through crashes, sent to the ledger. Not here: limits."""
