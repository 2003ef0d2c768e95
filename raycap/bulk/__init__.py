"""A folder or bucket of images -> one caption row per image: list, plan, caption, commit, verify."""
