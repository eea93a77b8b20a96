"""JSON schemas, made ready for the library that compiles them: what it reads otherwise than JSON Schema says.

    walk           what is a schema within a schema, and where references lead
    meaning        formats that nobody knows, counts written as floats
    unions         `oneOf` whose options exclude each other
    dead_ends      patterns and recursions behind which nothing valid could follow
    numbers        bounds that no double is
    big_numbers    constants that no double is: written in the grammar itself

`ready` does all of it.
"""
