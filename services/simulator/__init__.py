"""Simulator service: environments in their own processes behind one gRPC door; scripted experts that record demonstrations."""
