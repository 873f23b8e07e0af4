"""What ``python -m eit_lab.bench`` measures, and how. One file, one idea."""
