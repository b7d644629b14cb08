"""A blob made once with the libraries and calls of the public svm-tool (pylibfdt 1.7, pycryptodomex 3), not with ours.

The key pair was made for this file and opens nothing else.
"""

from __future__ import annotations

import base64

from services.ultravisor.esm_files import pack_name
from services.ultravisor.measure import measure
from shared.esm_blob import parse_blob
from shared.esm_crypto import fingerprint, load_private_key, public_pem
from shared.esm_digest import RTAS_TEXT, SecureImage

BLOB = base64.b64decode(
    """
0A3+7QAACKEAAAA4AAAISAAAACgAAAARAAAAEAAAAAAAAABZAAAIEAAAAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAMAAAAIAAAA
AGlibSxlc20AAAAAAWxvY2tib3hlcwAAAAAAAAFsb2NrYm94LTEAAAAAAAADAAABAAAAAB2b2w2B6M5YI0U2olSV3x0oEJL0iZ8v
YxCsf5GZ+MX7M5IOyI/kSC9S/Z2vVKmMfFOSbW0Y6c6qQ1mylkCQE8RqvvldjwlRkFiYc6+VHNuav8aLaB5TIWEuukXNLTMItKGU
XiPfkCa4lv0MgODyS/ey+gCeB8w9+nUbdAmonrFAHUM6N/o+voiJfASwZjcuBE8UWIpkEQb3OG2zvEpkTapFQwubhH3knDdTLCmp
aKOjyqcXSqvilTPy2xnblm1r1TQ0YiYWUEHFZWVjh6x9gHHpc8AaRy2LycTmjABqIMMNukUNPOvks/2VEPA06yPEXEwDq/Q6PsvF
ZTTCoXy847bMAAAAAwAAAAoAAAALdWx0cmFfdHBtAAAAAAAAAXB1YmtleS1maW5nZXJwcmludAAAAAAAAwAAACAAAAA4MO/4AIOA
RF1hbXUft3Md12bgRY5gpSf1f9s4Hk1j/zoAAAADAAAABwAAAC5TSEEyNTYAbAAAAAIAAAACAAAAAW9yaWdpbi1sb2NrYm94AAAA
AAADAAABAAAAAB0xoDpe0WSz43MatVbNZ0+yc3sOHTYWPJv6T+tbvPDPdUFs3h8ctMX5MOVJvruYXBxuz9KCK5W8pv1S4feAmD2p
deHi4TNnf02AoofbCT6oMYyqKCUCudo6uP6OF60Ba5TxKSJGEbCbKtMdOOOx55RG2J5aP3wmyQLJCtWZp65lC+2GOokzGweW2gaR
RSi1gazZCp/F9T23FKAcdTzxZJ9x/45YL8eqffYDJkZOsXqgilBA/fGwHdPzZDHxgraJ/mR/sVL4dHTsnUXpAGULPdHcNu1kP4Z4
IDHTP/8ItqTqM58AqOB2fzi3u11vyjlKbPIQo6WF+fVeA/qcPIGxfF3JAAAAAwAAAAEAAAALAGlnZQAAAAFwdWJrZXktZmluZ2Vy
cHJpbnQAAAAAAAMAAAAgAAAAOIuC3S8EVdJbWevAlOmFnqohZexGVpRikzCfG5qPppeBAAAAAwAAAAcAAAAuU0hBMjU2AGUAAAAC
AAAAAgAAAAIAAAABZGlnZXN0AAAAAAABZGlnZXN0cy1mZHQAAAAAAwAAABAAAABL3xuQjqMA0OzQmTU0xvKNXAAAAAMAAAAQAAAA
SP+gR+RUteIgv/aujAn6OToAAAADAAAB/QAAAD3W2K5vqEQxgRsl+zjiXJGsQ2Ww9trFQKe4C6crFhULxqVGhoGm/9nU9dOwPQkC
OeoHA6ldyp7Vy1Vsb+RtkYuSBWKpFaaQZNq64UCkZ/UdioumznXqfiHdJGsdlIHZRoqAOVqCEjusDyzUptpsq00MCShv9Vc5bup2
Wz/9QHckHrGVJw1Nq7oIO4/xUZaOOMbWhC45m7PHz0xzAIaQsySyJOzNsWgGrxEUnQkMAUoCZpqv3gicK8dZeWJL1BY0Mm3C+PR5
DGsz2G3u2DTubtlf4XQgzJKpKTDizvAD0/AaAp2MMmj2I5mVI5yNfrrUx7WU+Oq0xjbgbRlCwLgZyG6ojSCJwpRp3S1NvrRMYxUx
RqLz2CZoYHz3kKD6lb7sLxSODMzGrtxrUXlrB7c8NspngLAEKL43rYIf2AbXB/tL492g4FgmLTcOje7ZtmcEPmHn1kSxeTzNlFPl
Id45WA+oqqZPNIpJCwuDoHJVzCp6nHhh8JWow3FKo98rwo+K6bJXZz9/Nx9Mniaq5xWl+bB3yeTswEfVN0ZwsYKYFX+wPt57RnFp
BADE1+CyI+GmXP+aUQmGEjiKal1fjYyp5GNtfy+RmkDcDtW5Uo66NSdUwxawjLOp6XeczH6QS5ioBf0BI28zgtc0PdHNiapAE82N
kxikDMomhqUEbj91BgAAAAAAAAMAAAABAAAACwBFUzIAAAADAAAACwAAAC5BRVMyNTYtR0NNAAIAAAACAAAAAgAAAAFmaWxlAAAA
AAAAAAMAAAIFAAAAT9AN/u0AAAIFAAAAOAAAAcwAAAAoAAAAEQAAABAAAAAAAAAAOQAAAZQAAAAAAAAAAAAAAAAAAAAAAAAAAQAA
AAAAAAADAAAADQAAAABpYm0sZXNtLWZpbGUAAAAAAAAAAWZpbGVzAAAAAAAAAWVtcHR5AAAAAAAAAwAAABAAAAA1na2BmXHKdpfv
er5U2xSquAAAAAMAAAAQAAAAMlybufEeDv3xosDc8NjBnfYAAAADAAAAAAAAACcAAAADAAAAAQAAABUARVMyAAAAAwAAAAsAAAAL
QUVTMjU2LUdDTQAQAAAAAgAAAAFmaWxlLTEAAAAAAAMAAAAQAAAANStw6oMyv/UUuqAJwPMoeswAAAADAAAAEAAAADJux9hm5UW5
ng9kxqY9PSuSAAAAAwAAAF8AAAAnSTQGag/Kc1MSgFHztJCyA3b0jDMIRE7XKc7XCkiC11VvjaNJCaiV34lwj3qY/gcm5SMC+59X
OZ4+SwoLebJQwMNbm8gTnPLQlGQ6VfveKXOaTy6akC+O6wpzCPTGsyMAAAAAAwAAAAEAAAAVAEVTMgAAAAMAAAALAAAAC0FFUzI1
Ni1HQ00AYgAAAAIAAAACAAAAAgAAAAljb21wYXRpYmxlAGFsZ29yaXRobQB1bnRydXN0ZWQtY29tbWVudABjaXBoZXJ0ZXh0AGl2
AG1hYwAAAAAAAAACAAAAAgAAAAljb21wYXRpYmxlAHVudHJ1c3RlZC1jb21tZW50AGVuY3J5cHRlZC1zeW1rZXkAYWxnb3JpdGht
AGhhc2gAY2lwaGVydGV4dABpdgBtYWMAZmlsZXMtZmR0AA==
"""
)
MACHINE_KEY = b"""\
-----BEGIN RSA PRIVATE KEY-----
MIIEowIBAAKCAQEAsJv7ls3UO3TsHhi7wNXgz1M+/7km1EGU4JuRHgiwMcsUzupv
Oa34VBGUNP3dCrtEcDJRije4Sl2xOjHLDFnV/MH07MWRyCgvkRKi7sxXQIatqhjS
IOQWJttnHrO5EJUGRXxM/0jzn6NZNLfWQ/dy8y60LcW2F1DrKOF3KVOJBMazHmlr
8qwTtC/JBAot5x79vQ6L2ehUFnRIZMu/+6K1ASAIhaynhf+viXtM1vLrLaAtlgeC
1AR5v/YPmYO0pFYyCqlQ1D/8tptj/jspc72aI88Pzyap/mrjDx9XSUboRRNQvCKq
P1LvobYn6vCMKDKnDaLJr0GHtNkcmShA+Kx5SQIDAQABAoIBAAn28MuiBNSl+Vf7
qde1y9+v6ioN1plNjoqSTsCnEEVaYbUIvS72zwk8+4hR460rVOZY1QjyQ+Hy2IEP
f03xYWDsXA30fqJZnYe7pOJcXS2i2WYqXzVWKTCpNiaPB64U+nUJNKyr2sVgyXzd
IDpWo0rdSE5l+xi/+KAmb1/mH0WSw6Uv5oNaa7gU7YB0HRvFiuCGJGy9Yyl36Bk5
T+9MPFe0Ay6a0U7yQ2IaQfns9qZQ2cCqEgifvhbHs631iPBPOAxzy8SkBuoKMYHT
fUUT+9PXZ2qIEW4y7lhA3jrjCd0e0ayYAgDjLlrhc6+OWlCs+4k/U82l5RJ5H0Pq
A1al6hECgYEAtuRbDGzT4n6qJB1La8S+Jp9e8YcdxlA2kdm0rhdW15inrxxwfOO+
6vgDul+9Rs35+C2rDiw1sUiqmdzA3thUANIzfbWlAPwkNzTvqk2wN8NC6nOfUEzD
hz6GaGjoCwH9MqWDlkFfj/4TGY30vVZuFmHqRijWiDyGnpBYcayiqeMCgYEA9zS1
EJxKRYdKJz0dKWWRPOwBd90rU70COSzMI9mQQFrMBOK1HGNrh8brUo/PkvohZa+f
e7VpmIBjdiL7Z5w1M4mwowXGc8Wfy8f1wE5bfo6H9tufrt7OuVCNkLzqQ+mDJv2e
+jcdFXpE9dg7zpH2/apgD73D3JdYL/za3AeM5+MCgYEAh3Y5zckpYwAISvl7rFWr
tXWjX+eA8SrmUD7cqXlV9Bf4UyYQVyBkfyq1sCxLSA81z1Eb+kJafnXhDldIb4Xx
Ki6Gvtx0W3dl55II1a33EEZK4NZEsLg6tohkCx9whv6xJ/sZrIe9HSzFvs668CX9
Igzh9Zc31u5lkzo8l+2TCZsCgYAFwJc6BLkBty01jomALhncFg3OsTnR4AMOO4mg
h+6AYNyAfJoESBf3d9x/9lK5M9LVH+oRId6MKuillhjNh2gBhAG1OWwtw3p9bnC8
gdZFMqHdT6z+j7a1vzccGBlHbUadAKfTYLbvigHSyq5RlzntGyrTEvJczrTBoRui
pRZVSwKBgDFE6qpMeq8ck7AK61VGrLCxerp4vDAjqFF/I34s2WPBfknr2KmWjJGn
47pp5Za9lmdCqaq7+tPO+Urp/zFe7mGddXj6GudlxetXAX8DmtcmZq5JKXqL4oB/
xG+pBUq0ZSP4f1/oIQGL6PuokRNSW4vEIgLKyNEeATeryB9fCZ8w
-----END RSA PRIVATE KEY-----
"""

IMAGE = SecureImage(rtas=RTAS_TEXT, kernel=b"kernel" * 100, initrd=b"initrd" * 10, bootargs=b"svm=1 console=hvc0")


def test_a_blob_of_svm_tools_libraries_is_read() -> None:
    blob = parse_blob(BLOB)

    assert [(box.name, box.comment) for box in blob.lockboxes] == [("origin-lockbox", ""), ("lockbox-1", "ultra_tpm")]
    assert sorted(blob.files) == ["empty", "file-1"]
    assert len(blob.digests.iv) == 16


def test_it_names_our_key_as_we_do() -> None:
    key = load_private_key(MACHINE_KEY)

    assert parse_blob(BLOB).lockboxes[1].fingerprint == fingerprint(public_pem(key))


def test_it_opens_and_fits_its_image() -> None:
    opened = measure(BLOB, load_private_key(MACHINE_KEY), IMAGE)

    assert opened.lockbox == "lockbox-1"
    assert opened.digests.kernel_size_bytes == 600


def test_its_files_are_handed_out() -> None:
    files = measure(BLOB, load_private_key(MACHINE_KEY), IMAGE).files()

    count, words = files.get(0, pack_name("file-1"), pid=0)

    assert count == 64
    assert b"".join(word.to_bytes(8, "big") for word in words) == (b"secret of the disk\n" * 5)[:64]
