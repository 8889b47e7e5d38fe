"""The positions that each kernel entry meets, as integers and ranges; without torch."""
