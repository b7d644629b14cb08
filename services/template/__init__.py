"""The processes that the others of a cluster are forked from."""
