"""What the subcommands of `camopd` do; each imports what it needs when it is called."""
