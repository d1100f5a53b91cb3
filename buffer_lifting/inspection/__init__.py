"""Graph inspection for CI: rules, diagnostics, targets, output formats, baseline. Nothing here imports torch at import."""
