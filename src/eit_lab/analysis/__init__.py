"""What happens inside a network, as functions of tensors and the torchmetrics around them: frequencies, heads, similarity, filters."""
