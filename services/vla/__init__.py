"""Policy service: a frozen base policy with residual policies on top, batched across clients, behind one gRPC door."""
