"""The selective scan with a channel for each thread: for many states, where instructions are the limit."""
