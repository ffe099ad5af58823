"""What platforms accept: profiles, and the rules that lint holds an image against."""
