"""What would be read of a data set, in long form: look.py reads one image, split.py adds up those of a split, whole.py
says what the modes would take of all of it, page.py writes it for people.
"""
