"""The YAML files that `--config` finds by name, such as `--config single_turn`."""
