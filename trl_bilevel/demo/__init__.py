"""The demonstration behind `trl-bilevel demo`: planted faults, a model small enough for a CPU, and a comparison."""
