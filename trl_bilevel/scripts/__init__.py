"""What the subcommands of `trl-bilevel` run."""
