"""Read strictly what people and strangers wrote: settings, YAML, JSON, patterns of names, files of any kind."""
