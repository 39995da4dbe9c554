def why_not(op, layout, x):
    return "not built yet"
