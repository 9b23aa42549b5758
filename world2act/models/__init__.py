"""Networks: world model, base policy, adapters, residual policy."""
