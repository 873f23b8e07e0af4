"""Records -> tables and figures. No torch: a report of a hundred runs opens in seconds, on a laptop without a GPU."""
