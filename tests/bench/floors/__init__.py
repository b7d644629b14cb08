"""What the libraries alone cost: bare programs that import nothing of pefbox, with the socket options of its links."""
