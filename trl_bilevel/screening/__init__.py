"""What one forward pass says of a dataset before anybody trains, calibrated by rows that are trusted."""
