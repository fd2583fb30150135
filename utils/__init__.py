"""The ground that everything stands on: errors, registry, config, files, metrics, schedules, runtime."""
