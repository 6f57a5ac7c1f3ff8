#!/bin/sh
# Started as root, goes on as the owner of the folder mounted at /runs, so that what is written
# there belongs to whoever brought the folder; a folder of root's is given to the image's own user.
set -eu
if [ "$(id -u)" -ne 0 ]; then
    exec "$@"
fi
if [ "$(stat -c %u /runs)" -eq 0 ]; then
    chown gkd:gkd /runs
fi
# Another owner's, from a start with another folder, would not let this one write.
if [ "$(stat -c %u:%g /cache)" != "$(stat -c %u:%g /runs)" ]; then
    chown -R "$(stat -c %u:%g /runs)" /cache
fi
exec setpriv --reuid="$(stat -c %u /runs)" --regid="$(stat -c %g /runs)" --clear-groups \
    --no-new-privs "$@"
