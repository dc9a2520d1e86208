"""The proof: meters, quality, calibration, ledger."""
