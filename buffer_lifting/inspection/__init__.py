"""Graph inspection for CI: rules, diagnostics, targets, formats, baseline. Nothing here imports torch on import."""
