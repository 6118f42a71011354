"""Networks: plain nn.Module, torch only."""
