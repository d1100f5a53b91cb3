"""Graph passes. Each takes a copy of a graph, states what it requires, and checks what it ensures."""
