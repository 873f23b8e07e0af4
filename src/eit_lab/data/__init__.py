"""Images: what a data set is (catalog), its order and draws (order), reading it (small, imagenet), feeding it (module)."""
