// A request as a curl command that a person can run as it stands. Pure.

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

// `fields` as the API takes them; `images` maps a field to a file name. A key is named, not shown.
export function curlCommand(url, fields, { images = {}, needsKey = false } = {}) {
  const lines = [`curl ${quoted(url)}`];
  if (needsKey) lines.push('-H "Authorization: Bearer $WAN_API_KEY"');
  if (Object.keys(images).length === 0) {
    const body = JSON.stringify(fields, null, 2).replace(/"seed": "([0-9]+)"/, '"seed": $1');
    lines.push("-H 'Content-Type: application/json'", `-d ${quoted(body)}`);
  } else {
    for (const [name, value] of formFields(fields)) {
      lines.push(`--form-string ${quoted(`${name}=${value}`)}`);
    }
    for (const [name, file] of Object.entries(images)) {
      const path = file.replaceAll("\\", "\\\\").replaceAll('"', '\\"');
      lines.push(`-F ${quoted(`${name}=@"${path}"`)}`);
    }
  }
  return lines.join(" \\\n  ");
}

// Fields as a form has them: an object's as `name[inner]`.
export function formFields(fields) {
  return Object.entries(fields).flatMap(([name, value]) =>
    value !== null && typeof value === "object"
      ? Object.entries(value).map(([inner, each]) => [`${name}[${inner}]`, each])
      : [[name, value]],
  );
}
