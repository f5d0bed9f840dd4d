def midrange(values, sent, weight):
    """Average the smallest and the largest change of each coordinate."""
    return (values.amin(0) + values.amax(0)) / 2, sent.any(0)
