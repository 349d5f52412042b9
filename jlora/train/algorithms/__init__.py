"""What a run can minimise, one file an algorithm, behind one interface to the loop."""
