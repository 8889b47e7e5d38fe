"""Workers that train one model together: sums, means and errors that they share."""
