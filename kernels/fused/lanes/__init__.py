"""The selective scan with positions of a sequence dealt out to lanes: for few states, where memory is the limit."""
