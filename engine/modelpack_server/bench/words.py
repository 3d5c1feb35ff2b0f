"""Words: token ids as text, for servers that take text only.

Each id becomes one of a few hundred short English words, which nearly every vocabulary has as one
token together with the space before it: a prompt of so many ids is one of about as many tokens, and
prompts share a beginning where their ids do.
"""

from __future__ import annotations

from collections.abc import Iterable

_TEXT = """
able about above act add after again age ago air all alone along also always and animal answer
any appear area arm around art ask away back bad ball bank bar base beat bed been before began
best big bird black blue board boat body book both bottom box boy bring brother build busy buy
call came car care carry case cat catch cause cell cent center chair chance change check child
choose city class clean clear close cloud coast cold color come common cook cool copy corn
correct cost count country course cover cross cry current cut dance dark day dead deal dear deep
degree did die direct do doctor dog dollar done door down draw dream dress drink drive drop dry
during each ear early earth east easy eat edge effect egg eight else end energy engine enough
enter equal even evening event ever every exact example eye face fact fair fall family far farm
fast father fear feed feel feet few field fight fill find fine finger finish fire first fish fit
five floor flow fly follow food foot force form forward found four free fresh friend from front
fruit full fun game garden gas gave get girl give glad glass go gold gone good got govern grand
grass gray great green grew ground group grow guess had half hand happen hard has hat have he
head hear heart heat heavy held help her here high hill his history hit hold hole home hope
horse hot hour house how huge human hundred hunt ice idea if in inch industry iron island job
join jump just keep key kill kind king knew know lady lake land language large last late laugh
law lay lead learn least leave led left leg length less let letter level lie life lift light
like line list listen little live long look lost lot loud love low machine made main make man
many map mark market mass matter may mean measure meat meet men metal method middle might mile
milk million mind mine minute miss modern moment money month moon more morning most mother
mountain mouth move much music must name nation nature near neck need never new next night nine
no noise noon north nose note nothing notice now number object ocean of off offer office often
oil old on once one only open or order other our out over own page paint pair paper part party
pass past path pay people perhaps person picture piece place plain plan plane plant play please
point poor position possible post pound power present press pretty print problem produce product
pull push put question quick quiet race radio rain ran range rate reach read ready real reason
red rest result rich ride right ring rise river road rock roll room root round row rule run said
sail salt same sand save saw say school science sea season seat second see seed seem self sell
send sense sent serve set seven several shall shape share she ship shoe shop short should show
side sign silver simple since sing single sister sit six size skin sky sleep slow small smell
smile snow so soft soil some son song soon sound south space speak special speed spell spend
spot spring square stand star start state stay
"""
_WORDS = _TEXT.split()


def text_of(token_ids: Iterable[int]) -> str:
    """Return a text of about as many tokens, the same for the same ids."""
    return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids)
