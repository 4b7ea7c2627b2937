"""What bench, eval, train and info share: machines, bandwidth, interleaved runs, tables. Knows no model."""
