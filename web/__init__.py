"""The HTTP surface beside the data plane: management routes and who may call them."""
