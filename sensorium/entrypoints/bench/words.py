"""Common short English words, for random texts: most tokenizers have a token for each."""

_TEXT = """
a about above act again air all also and animal answer any area as ask at back be bear bed before best big black blue
body book both box boy bring build but by call can car care case change child city close cold come cut day deep did
dog door down draw dry each ear earth eat end even eye face fact fall far fast feel few field find fire first fish fly
food foot for form free from front full game get girl give go gold good great green ground group grow half hand hard
have head hear heat help here high hold home hot house how hour idea if in inch just keep kind know land large last
late lead leave left less let letter life light like line list live long look love low make man many map mark mean
measure men mind moon more most move much music name near need never new next night no north note now number of off
old on one only open or order other our out over own page paper part pass people picture place plan plant play point
power press pull question rain read red rest right river road rock room run said same say school sea second see seem
self set ship short show side size sleep slow small snow so some song soon sound south space stand star start state
stay step stop story street strong study such sun table take talk tell ten test than that the then thing think this
those time to top town travel tree true turn two under unit up use very voice walk want war warm was watch water way
week well west what wheel when where while white who why will wind with wood word work world would write year yes you
young
"""
WORDS = tuple(_TEXT.split())
